#!/bin/sh
# Draws paper_figures/FOLDER again from experiments/records/FOLDER, for each folder named, or for all of them.
set -e
[ $# -gt 0 ] || set -- $(ls -d experiments/records/*/ | xargs -n 1 basename)
for folder; do
  records=experiments/records/$folder out=paper_figures/$folder
  echo "$out" >&2
  case $folder in
  ablation | budget) "$PYTHON" paper_figures/draw_ablation.py "$records" --out "$out" ;;
  links | peers | predicted | calibration) "$PYTHON" "paper_figures/draw_$folder.py" "$records" --out "$out" ;;
  *) "$PYTHON" -m spd report "$records" --out "$out" --records runs --no-mlflow ;;
  esac
  case $folder in
  spd-tiny) "$PYTHON" paper_figures/draw_ablation.py "$records" --out "$out/method-table1" ;;
  esac
  case $folder in
  spd-tiny | sensitivities) "$PYTHON" paper_figures/draw_method.py "$records" --out "$out/method" ;;
  esac
done >/dev/null
