"""Figures of the paper: Li, Xiang, Miller, Kesidis, ICASSP 2022, tables 1 to 4."""

from __future__ import annotations

# Tables 2 and 4: TPR, FPR, SIA.
VERDICTS = {
    ("mnist", "CB", "multi"): (1.0, 0.0033, 0.9413),
    ("mnist", "WB", "multi"): (1.0, 0.0022, 0.9764),
    ("fashion_mnist", "CB", "multi"): (1.0, 0.0023, 0.6948),
    ("fashion_mnist", "WB", "multi"): (0.9951, 0.0127, 0.8039),
    ("cifar10", "CB", "single"): (0.9922, 0.0, 0.8392),
    ("cifar10", "SP", "single"): (0.9813, 0.0, 0.7728),
    ("cifar10", "WB", "single"): (0.9847, 0.0, 0.8607),
    ("cifar10", "CB", "multi"): (0.9997, 0.0, 0.6946),
    ("cifar10", "SP", "multi"): (0.9454, 0.0, 0.632),
    ("cifar10", "WB", "multi"): (0.9992, 0.0, 0.8945),
    **{(faces, "SQ", "multi"): (0.9856, 0.1428, 0.7194) for faces in ("pubfig", "faces_standin")},
    **{(faces, "WM", "multi"): (1.0, 0.1428, 0.5507) for faces in ("pubfig", "faces_standin")},
}
# Table 1: ACC, ASR of the trigger, ASR of the estimated pattern.
CLASSIFIERS = {
    ("cifar10", "none", "none"): (0.9387, None, None),
    ("cifar10", "CB", "single"): (0.9360, 0.9955, 1.0),
    ("cifar10", "SP", "single"): (0.9354, 0.9488, 0.99),
    ("cifar10", "WB", "single"): (0.9324, 0.9411, 0.997),
    ("cifar10", "CB", "multi"): (0.9381, 0.9954, 0.9876),
    ("cifar10", "SP", "multi"): (0.9337, 0.9565, 0.9953),
    ("cifar10", "WB", "multi"): (0.9340, 0.9497, 0.9354),
}
# Table 2, of the threshold with the best TPR for an FPR around 5 %: TPR, FPR.
OTHERS = {
    ("CB", "single", "nc"): (0.9855, 0.0488),
    ("SP", "single", "nc"): (0.8088, 0.0544),
    ("WB", "single", "nc"): (0.0, 0.0522),
    ("CB", "multi", "nc"): (0.9962, 0.0533),
    ("SP", "multi", "nc"): (0.9043, 0.0511),
    ("WB", "multi", "nc"): (0.8644, 0.0522),
    ("CB", "single", "b3d"): (0.0788, 0.0511),
    ("SP", "single", "b3d"): (0.5333, 0.1066),
    ("WB", "single", "b3d"): (0.0011, 0.05),
    ("CB", "multi", "b3d"): (0.9872, 0.9955),
    ("SP", "multi", "b3d"): (0.1814, 0.0522),
    ("WB", "multi", "b3d"): (0.0535, 0.0511),
    ("CB", "single", "strip"): (0.0822, 0.0533),
    ("SP", "single", "strip"): (0.1333, 0.0588),
    ("WB", "single", "strip"): (0.0088, 0.0588),
    ("CB", "multi", "strip"): (0.0218, 0.0555),
    ("SP", "multi", "strip"): (0.1555, 0.0588),
    ("WB", "multi", "strip"): (0.0011, 0.0633),
}
# Table 2, SIA of Neural Cleanse's patching at its best learning rate.
NC_BEST = {
    ("CB", "single"): 0.9444,
    ("SP", "single"): 0.8833,
    ("WB", "single"): 0.8667,
    ("CB", "multi"): 0.8765,
    ("SP", "multi"): 0.8963,
    ("WB", "multi"): 0.8086,
}
# Table 3, CIFAR-10, WB multi-class: SIA of Neural Cleanse's patching at each learning rate.
PATCHING = {10.0: 0.1114, 1.0: 0.4291, 0.1: 0.6033, 0.01: 0.8086, 0.001: 0.7103, 0.0001: 0.6348}
