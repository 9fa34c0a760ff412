"""Compressed DICOM frames, decoded in a process of their own: on some damage GDCM ends the one that it is in."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from lingshu_rl.apart import Apart, Ended, NoAnswer
from lingshu_rl.imaging.pixels import ScanError


class Decoder(Apart):
    """Of frames."""

    def frame(self, file: Path, number: int) -> np.ndarray:
        """Stored values of one frame, colours as RGB. Raises ScanError, also where the decoder ended or is stuck."""
        try:
            told = self.ask(str(file.absolute()), number)
        except Ended:
            raise ScanError(f"{file}: frame {number} ended its decoder: the file is damaged") from None
        except NoAnswer as why:
            raise ScanError(f"{file}: frame {number} cannot be decoded: {why}") from None
        return np.load(io.BytesIO(told), allow_pickle=False)


DECODER = Decoder("lingshu_rl.imaging.decoding_child")
