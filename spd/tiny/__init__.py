"""`spd-tiny`: the small LLaMA this project trains itself, and the text it was trained on."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
