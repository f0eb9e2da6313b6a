r"""GeDi: a small class-conditional language model steers a large one, by Bayes' rule over all next tokens.

A class-conditional model says :math:`P(x \mid c)` behind a control code c. Behind each prefix, one pass under the
wanted code and one under the other give

.. math:: P(c \mid x_{1:t}) \propto e^{b_c} P(x_{1:t} \mid c)^{\alpha / t}

for every candidate :math:`x_t` at once, which weighs the large model's law, :math:`P_{LM}(x_t) P(c \mid
x_{1:t})^\omega`. ::

    steersman apply gedi --subject MODEL --input reviews.csv --attribute sentiment=positive --out my-guide

    model.generate(**inputs, logits_processor=[GeDi.from_pretrained("my-guide")])
"""

from steersman.language.gedi.applying import apply, read_labelled
from steersman.language.gedi.codes import ControlCodes
from steersman.language.gedi.conditional import BestOf, ClassConditional, PosteriorScorer
from steersman.language.gedi.processor import GeDi, ShiftLogits, class_log_posterior, remove_unlikely
from steersman.language.gedi.training import GeDiTrainer, GenerativeClassifier, hybrid_loss, tokenized

__all__ = [
    "BestOf",
    "ClassConditional",
    "ControlCodes",
    "GeDi",
    "GeDiTrainer",
    "GenerativeClassifier",
    "PosteriorScorer",
    "ShiftLogits",
    "apply",
    "class_log_posterior",
    "hybrid_loss",
    "read_labelled",
    "remove_unlikely",
    "tokenized",
]
