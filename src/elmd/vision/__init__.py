"""From clips to visual tokens: decoding, the frozen encoder, pooling (eq. 5-8), the store of features."""

from importlib.util import find_spec


def default_decoder() -> str:
    """What reads clips unless the configuration says otherwise: decord where it is installed, else PyAV.

    decord has wheels for x86-64 Linux and Windows only. Where both can read a video, their pixels are equal.
    """
    return "decord" if find_spec("decord") else "pyav"
