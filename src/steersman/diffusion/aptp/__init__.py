r"""APTP: one text-to-image network pruned into experts, and a router that sends each prompt to one of them.

    e = H(z),  S = w(e) w(a)ᵀ,  code = argmax of the transport of S (training), of S (use)

A. Ganjdanesh, R. Shirkavand, S. Gao, H. Huang, "Not All Prompts Are Made Equal: Prompt-based Pruning of Text-to-Image
Diffusion Models", ICLR 2025, arXiv:2406.12042.

``gates``: what can be pruned; ``costs``: multiply-adds; ``surgery``: the cut; ``routing``: from prompts to
architectures; ``losses``; ``training``: the three stages; ``pipeline``: prompts to experts; ``captions``: data.
"""

from steersman.diffusion.aptp.artefact import apply
from steersman.diffusion.aptp.captions import PooledText, read_captioned
from steersman.diffusion.aptp.costs import MultiplyAdds
from steersman.diffusion.aptp.gates import GateLayout, gated
from steersman.diffusion.aptp.pipeline import PromptRoutedPipeline, RoutedUNet
from steersman.diffusion.aptp.routing import Router, sinkhorn, within_budget
from steersman.diffusion.aptp.surgery import cut, load_pruned, save_pruned
from steersman.diffusion.aptp.training import APTPConfig, PromptRoutedPruner

__all__ = [
    "APTPConfig",
    "GateLayout",
    "MultiplyAdds",
    "PooledText",
    "PromptRoutedPipeline",
    "PromptRoutedPruner",
    "RoutedUNet",
    "Router",
    "apply",
    "cut",
    "gated",
    "load_pruned",
    "read_captioned",
    "save_pruned",
    "sinkhorn",
    "within_budget",
]
