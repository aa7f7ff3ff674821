"""Files that come with the package, in a checkout and in a wheel alike: the quickstart's model and its instructions."""

from collections.abc import Mapping
from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
# name -> place in ASSETS
MODELS = {"quickstart": "tiny_llama"}
DATA = {"quickstart": "instructions/train.json"}
_PREFIX = "assets/"


def located(path: str, names: Mapping[str, str] = MODELS) -> Path:
    """What a user's name of a file or folder stands for.

    Something that is here goes first. Where nothing is, one of `names` is what the package has under it, and assets/...
    the package's own file of that name. A folder of such a name that is here counts as it only with a config.json.
    """
    local = Path(path).expanduser()
    if path in names and not (local.is_file() or (local / "config.json").is_file()):
        return ASSETS / names[path]
    if path.startswith(_PREFIX) and not local.exists():
        own = ASSETS / path.removeprefix(_PREFIX)
        return own if own.exists() else local
    return local
