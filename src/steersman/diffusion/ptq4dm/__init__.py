"""Post-training quantisation of diffusion networks, calibrated on states that the sampler visits.

quantize_ptq4dm(pipe, bits=8).install(pipe)                             # simulated, on any device
quantize_ptq4dm(pipe, bits=8, execution="int8").install(pipe)           # oneDNN's integer kernels, on the CPU
"""

from steersman.diffusion.ptq4dm.calibration import Calibration, CalibrationSet, collect
from steersman.diffusion.ptq4dm.layers import Activation, Call, QuantisedLayer, kernels, quantised_weight
from steersman.diffusion.ptq4dm.method import PTQ4DM, quantisable, quantize_ptq4dm
from steersman.diffusion.ptq4dm.quantisers import affine, codes, quantise, search, search_affine

__all__ = [
    "PTQ4DM",
    "Activation",
    "Calibration",
    "CalibrationSet",
    "Call",
    "QuantisedLayer",
    "affine",
    "codes",
    "collect",
    "kernels",
    "quantisable",
    "quantise",
    "quantised_weight",
    "quantize_ptq4dm",
    "search",
    "search_affine",
]
