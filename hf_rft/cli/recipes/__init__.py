"""The recipes and accelerate configurations that come with the package, by name."""

import difflib
from pathlib import Path


FOLDER = Path(__file__).parent


def names_of(group: str | None = None) -> list[str]:
    """Names of the files in one folder; None: of all recipes, each with its folder."""
    if group is not None:
        return sorted(path.stem for path in FOLDER.glob(f"{group}/*.yaml"))
    found = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.glob("*/*.yaml"))
    return sorted(path.as_posix() for path in found if path.parts[0] != "accelerate_configs")


def find_file(flag: str, name: str, group: str | None = None) -> Path:
    """A file of the user's, or one that comes with the package.

    Raises:
        ValueError: if there is neither; the message names the flag and what there is.
    """
    if Path(name).is_file():
        return Path(name)
    known = names_of(group)
    if (short := name.removesuffix(".yaml")) in known:
        return FOLDER / (group or "") / f"{short}.yaml"
    nearest = difflib.get_close_matches(short, known, n=1)
    hint = f"Did you mean {nearest[0]}?" if nearest else f"The package comes with {', '.join(known)}."
    raise ValueError(f"{flag} {name} is neither a file nor the name of one. {hint}")


def find_recipes(flag: str, name: str) -> list[Path]:
    """The recipe of that name, or all recipes in the folder of that name.

    Raises:
        ValueError: as [`find_file`] does.
    """
    folders = [folder for folder in (Path(name), FOLDER / name) if folder.is_dir()]
    if folders and (found := sorted(folders[0].glob("*.yaml"))):
        return found
    return [find_file(flag, name)]
