"""What an installed package asks for here, but for torch and what text models do without; one requirement a line.

usage: requirements.py PACKAGE==VERSION
"""

from __future__ import annotations

import sys
from importlib.metadata import requires

# pip's copy, since a new environment has no other
from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "xgrammar"}
"""torch has been chosen already; xgrammar asks for triton, which only GPUs need, and is installed without."""

if __name__ == "__main__":
    for text in requires(sys.argv[1].partition("==")[0]) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if requirement.name in LEFT_OUT or (marker and not marker.evaluate({"extra": ""})):
            continue
        requirement.marker = None
        print(requirement)
