"""Reference models of steersman, as data: a folder per subject, each with its ``provenance.json``.

There is no code here; ``steersman.reference.loading`` finds and verifies the files.
"""

__version__ = "0.1.0"
