"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one.

    The content goes to a temporary file beside the target, which then takes its name.

    Args:
        path: Where to; an existing file is replaced.
        content: The whole content.

    Raises:
        FileNotFoundError: The directory does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no directory {target.parent}")
    staged = target.with_name(f".{target.name}.writing")
    try:
        with open(staged, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
