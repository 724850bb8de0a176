"""Does the demo keep what the README promises?  Usage: python tests/check_demo.py FIGURES.json."""

import json
import sys
from pathlib import Path

from inflight_edge.calibration.demo import FIGURES

figures = json.loads(Path(sys.argv[1]).read_text())
false_alarms = round(figures["fpr"] * figures["n_clean"])
assert tuple(figures) == FIGURES, f"expected the keys {FIGURES}, got {tuple(figures)}"
assert figures["target_class"] == 9, f"expected target class 9, got {figures['target_class']}"
assert figures["tpr"] >= 0.98, f"expected a true positive rate of .98, got {figures['tpr']}"
assert false_alarms <= 1, f"expected at most one false alarm, got {false_alarms} of {figures['n_clean']}"
assert figures["sia"] >= 0.90, f"expected a source accuracy of .90, got {figures['sia']}"
assert figures["seconds"] < 180, f"expected less than 180 s, got {figures['seconds']}"
print("the demo keeps its promises")
