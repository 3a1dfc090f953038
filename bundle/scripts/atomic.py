"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_whole"]


@contextmanager
def written_whole(path: Path, what: str, reason: Callable[[Exception], str] = str) -> Iterator[Path]:
    """Give a name to write a file under, and rename the file to its own when it is complete.

    A failure leaves neither a broken file nor a temporary one, and a file that was there before stays.

    Args:
        path: the file, in a folder that exists.
        what: what it is, for the message.
        reason: says in one line what an error that is no plain `OSError` means.

    Yields:
        A path in the same folder that ends alike.

    Raises:
        OSError: naming the file, if it cannot be written; also for a `RuntimeError`, which is how ITK says so.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_whole(Path(folder, "notes.txt"), "notes") as name:
        ...         _ = name.write_text("all of it")
        ...     os.listdir(folder)
        ['notes.txt']
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}{''.join(path.suffixes[-2:])}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        text = error.strerror or reason(error)
        raise OSError(error.errno or errno.EIO, f"cannot write the {what}: {text}", str(path)) from error
    except RuntimeError as error:
        raise OSError(errno.EIO, f"cannot write the {what}: {reason(error)}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
