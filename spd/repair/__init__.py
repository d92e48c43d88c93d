"""Repairs of blocks that drop their attention sync: without training, by distillation, and what each step gives."""
