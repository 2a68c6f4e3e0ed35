"""Videos that are no files by themselves: addresses, and members of tars.

An address is PROTOCOL://..., whatever fsspec opens: s3://, https://, file://, ... A member is
ARCHIVE.tar::NAME; its archive, an uncompressed tar, may lie on a disk or at an address. A file on a
disk that has such a name is that file.
"""

import functools
import io
import os
import re
import tarfile
import time

ADDRESS = re.compile(r"(?:\w+::)*[a-z][a-z0-9+.-]+://.", re.IGNORECASE)  # also cache::https://...
MEMBER = re.compile(r"(.+?\.(?:tar|tar\.\w+|tgz))::(.+)", re.IGNORECASE | re.DOTALL)
COMPRESSED = b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"  # gzip, bzip2, xz, zstd
PAUSES = 0.5, 1, 2, 4  # seconds before what has failed is tried again
PATIENCE = 60  # seconds after which it is not
AT_ONCE = 64 << 20  # bytes: a file up to this size is fetched in one request
BLOCK = 1 << 20  # bytes of a large file that are fetched at once
BLOCK_OF_TAR = 1 << 18  # while its members are looked for


def is_address(path: str) -> bool:
    """Whether fsspec has to open it, or the archive that it is in."""
    return "://" in path and bool(ADDRESS.match(path))


def split(path: str) -> tuple[str, str]:
    """ARCHIVE.tar::NAME -> (ARCHIVE.tar, NAME); any other path -> (path, "")."""
    match = MEMBER.fullmatch(path) if "::" in path else None
    return match.groups() if match and not os.path.exists(path) else (path, "")


def is_remote(path: str) -> bool:
    """Whether it is an address or a member of a tar."""
    return bool(split(path)[1]) or is_address(path)


@functools.cache
def know(start: str):
    """ValueError where what opens an address that starts so, up to ://, is not installed."""
    for protocol in re.findall(r"([\w+.-]+)(?:::|://)", start):
        try:
            import fsspec
            fsspec.get_filesystem_class(protocol)
        except ImportError as e:
            lack = "`pip install fsspec`" if e.name == "fsspec" else f"another package: {e}"
            raise ValueError(f"addresses {protocol}://... need {lack}") from None
        except ValueError as e:
            raise ValueError(f"{protocol}://... is no address that fsspec knows ({e})") from None


def exists(path: str) -> bool:
    """Whether what is remote may be there: nothing is asked over a network.

    Addresses are taken to exist, and members where their archive does: those that lack are found
    when they are read. ValueError: an address of a kind that cannot be read here.
    """
    archive, name = split(path)
    if is_address(archive):
        know(archive[:archive.index("://") + 3])
        return True
    return bool(name) and os.path.isfile(archive)


def retried(function, *args, **kwargs):
    """What the function gives, tried again after errors that may pass; OSError: they did not."""
    start = time.monotonic()
    for pause in (*PAUSES, None):
        try:
            return function(*args, **kwargs)
        except Exception as e:  # each file system has its own
            e = e.__cause__ or e  # fsspec says "not found" of whatever went wrong over https
            status = getattr(e, "status", 0)  # of HTTP
            lasting = 400 <= status < 500 and status not in (408, 429) or isinstance(
                e, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError,
                    NotImplementedError))
            if lasting or pause is None or time.monotonic() - start > PATIENCE:
                tries = "" if lasting else ", tried again and again"
                if status == 404 or isinstance(e, (FileNotFoundError, NotADirectoryError)):
                    raise FileNotFoundError("no such file") from None
                raise OSError(" ".join(f"{type(e).__name__}: {e}{tries}".split())) from None
        time.sleep(pause)


class Part(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file that can be sought in.

    fetch(start, end) -> bytes of the whole file. block: so many (0: BLOCK) are fetched at once, and
    the last 16 such kept. whole: up to this size all are fetched now. mtime: what tells the file
    from a later one of its name. error: what ended the reading, None: nothing; from then on there
    is no more to read, which FFmpeg takes for the file's end.
    """

    def __init__(self, name: str, fetch, start: int, size: int, mtime, block=0, whole=0):
        # FFmpeg goes by the ending of the name, too
        self.name = name.partition("?")[0] if is_address(name) else name
        self.size, self.mtime, self.error = size, mtime, None
        self.fetch, self.start, self.place = fetch, start, 0
        self.block = max(1, size) if size <= whole else block or BLOCK
        self.held = {}  # number of a block -> its bytes
        if size <= whole:
            self.read_block(0)

    def read_block(self, i: int) -> bytes:
        """OSError where fewer bytes come than there should be."""
        if i in self.held:
            return self.held[i]
        start, end = i * self.block, min((i + 1) * self.block, self.size)
        data = self.fetch(self.start + start, self.start + end) if end else b""
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes instead of {end - start} from {start} on: cut off")
        if len(self.held) == 16:
            self.held.pop(next(iter(self.held)))
        self.held[i] = data
        return data

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.place

    def seek(self, offset, whence=0):
        self.place = max(0, offset + (0, self.place, self.size)[whence])
        return self.place

    def readinto(self, buffer):
        if self.error or self.place >= self.size:
            return 0
        i, offset = divmod(self.place, self.block)
        try:
            data = memoryview(self.read_block(i))[offset:offset + len(buffer)]
        except OSError as e:
            self.error = e
            raise
        buffer[:len(data)] = data
        self.place += len(data)
        return len(data)


def source(archive: str, known: tuple = ()) -> tuple:
    """A file or an address -> (fetch as of Part, bytes, mtime as of Part); OSError where not.

    known: (bytes, mtime), where they need not be asked for.
    """
    if not is_address(archive):
        def fetch(start, end):
            with open(archive, "rb") as f:
                f.seek(start)
                return f.read(end - start)
        about = os.stat(archive)
        return fetch, about.st_size, about.st_mtime
    exists(archive)  # else ValueError
    import fsspec
    # asked for here, in the process that reads: its connections would not survive a fork
    files, place = fsspec.core.url_to_fs(archive)
    held = b""
    if not known:
        about = retried(files.info, place)
        if about["type"] == "directory":
            raise OSError("is a folder")
        known = about["size"], str(sorted(about.items(), key=str))
    size, mtime = known

    def read(start, end):
        data = files.cat_file(place, start=start, end=end)
        if size is not None and len(data) not in (end - start, size):
            raise OSError(f"{len(data)} bytes came instead of {end - start}")
        return data

    def fetch(start, end):
        nonlocal held
        data = held[start:end] if held else retried(read, start, end)
        if len(data) == end - start:
            return data
        held = data  # of a server that knows no ranges, and gives all
        return held[start:end]
    if size is None:  # nor tells sizes
        held = retried(files.cat_file, place)
        size = len(held)
    return fetch, size, mtime


@functools.lru_cache(1000)
def members(archive: str, mtime: float | None) -> tuple:
    """-> {name: (first byte, bytes)} of a tar's files, what is wrong with it, its (bytes, mtime).

    All headers are read, once in a process. mtime: that of an archive on a disk.
    """
    fetch, size, stamp = source(archive)
    found, wrong = {}, ""
    if fetch(0, min(size, 6)).startswith(COMPRESSED):
        raise OSError("the archive is compressed: expected a plain .tar")
    part = io.BufferedReader(Part(archive, fetch, 0, size, stamp, BLOCK_OF_TAR), 512)
    try:
        with tarfile.open(fileobj=part, mode="r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    found[member.name.removeprefix("./")] = member.offset_data, member.size
            part.seek(tar.offset)
            if part.read(512) != bytes(512):
                wrong = ", which is cut off"
    except tarfile.ReadError as e:
        wrong = ", which is cut off"
        if not found:
            raise OSError(f"the archive is no tar ({e})") from None
    return found, wrong, (size, stamp)


def open_file(path: str, whole: int = 0) -> Part:
    """A file, an address or a member of a tar, to be sought in; OSError, ValueError: it cannot be.

    whole: up to this many bytes are fetched at once.
    """
    archive, name = split(path)
    if not name:
        fetch, size, mtime = source(path)
        return Part(path, fetch, 0, size, mtime, whole=whole)
    mtime = None if is_address(archive) else os.stat(archive).st_mtime
    found, wrong, about = members(archive, mtime)
    name = name.removeprefix("./")
    if name not in found:
        raise OSError(f"no such file among the {len(found)} in the archive{wrong}")
    (start, size), (fetch, total, mtime) = found[name], source(archive, about)
    if start + size > total:
        raise OSError("the archive is cut off within it")
    return Part(path, fetch, start, size, mtime, whole=whole)


def open_binary(path: str) -> io.BufferedReader:
    """Any file, on a disk too."""
    return io.BufferedReader(open_file(path, AT_ONCE)) if is_remote(path) else open(path, "rb")


def size(path: str) -> int:
    """Bytes of a file or of a member of a tar on a disk; OSError: others are not asked."""
    if is_address(path):
        raise OSError("an address")
    return open_file(path).size if is_remote(path) else os.path.getsize(path)


def copy(address: str, out: str):
    """Fetches a whole file to a path on a disk; OSError where it cannot be."""
    import fsspec
    files, place = fsspec.core.url_to_fs(address)

    def get():
        files.get_file(place, out)
        if files.info(place)["size"] not in (None, os.path.getsize(out)):
            raise OSError("a part of it came")
    retried(get)
