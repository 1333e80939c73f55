"""Where the image of a request may come from: the one place that says what a stranger may make the server open.

- `data:` URLs in base64.
- https URLs whose host has public addresses alone. The connection goes to an address that was checked, not to the name
  once more, and every redirect is checked anew. GDAL never opens a URL of a request.
- Where the server was started with a folder: `file:` URLs and absolute paths below it, symbolic links resolved first.

A picture is opened from its bytes, so nothing that it names is opened. A TIFF or JPEG 2000 of the folder is read from
where it lies, some rows at a time; formats that name other files, as VRT, are never opened.
"""

import asyncio
import base64
import binascii
import hashlib
import ipaddress
import os
import re
import socket
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from ..raster_files_uhr_bat import is_raster
from .front import UnreadImage
from .refusals import Refusal

# Redirects of a URL that are followed.
MAX_REDIRECTS = 3
# Seconds for a whole image to arrive from elsewhere.
FETCH_SECONDS = 30
# Letters of a source in errors.
SHOWN = 100


@dataclass(frozen=True)
class SourceRules:
    """What images a request may name.

    Attributes:
        max_bytes: of an image file that is held in memory.
        folder: below which paths may be named, resolved; None: no path may.
        private_hosts: names, or name:port, that may have private addresses and be asked without TLS.
    """

    max_bytes: int
    folder: Path | None = None
    private_hosts: frozenset[str] = frozenset()

    async def read(self, url: str) -> UnreadImage:
        """The image that a request names.

        Raises:
            Refusal: it may not be opened, is too large or cannot be had.
        """
        scheme = urlsplit(url[:SHOWN]).scheme.lower()
        if scheme == "data":
            return await asyncio.to_thread(self.decode, url)
        if scheme in ("http", "https"):
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    content = await self.fetch(url)
            except TimeoutError:
                raise refused(url, f"it did not arrive within {FETCH_SECONDS} seconds") from None
            return await asyncio.to_thread(UnreadImage.of_bytes, content, shown(url))
        if scheme == "file" or url.startswith("/"):
            return await asyncio.to_thread(self.open_path, url)
        raise refused(url, "it must be a data: URL in base64, an https: URL or, where the server allows it, a path")

    # Base64

    def decode(self, url: str) -> UnreadImage:
        header, comma, payload = url.partition(",")
        if not comma or not header.endswith(";base64"):
            raise refused(url, "a data: URL is data:image/...;base64,...")
        self.check_size(len(payload) * 3 // 4, "image")
        try:
            return UnreadImage.of_bytes(base64.b64decode(payload, validate=True))
        except (binascii.Error, ValueError) as error:
            raise refused(url, f"it is not base64 ({error})") from error

    def check_size(self, num_bytes, name):
        if num_bytes > self.max_bytes:
            raise Refusal(
                f"{name}: {num_bytes} bytes are over the limit of {self.max_bytes} bytes for an image.",
                status=413,
                param="messages",
                code="image_too_large",
            )

    # URLs

    async def fetch(self, url: str) -> bytes:
        import httpx

        # A proxy would look names up by itself, so none is used.
        async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=FETCH_SECONDS) as client:
            for _ in range(MAX_REDIRECTS + 1):
                checked, options = await self.address(url)
                try:
                    async with client.stream("GET", checked, **options) as response:
                        if not response.is_redirect:
                            return await self.receive(response, url)
                        url = str(httpx.URL(url).join(response.headers["Location"]))
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    raise refused(url, f"it cannot be fetched ({type(error).__name__})") from error
        raise refused(url, f"it is redirected more than {MAX_REDIRECTS} times")

    async def receive(self, response, url) -> bytes:
        if response.status_code != 200:
            raise refused(url, f"its server answers {response.status_code}")
        self.check_size(int(response.headers.get("Content-Length", 0)), shown(url))
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            self.check_size(len(content), shown(url))
        return bytes(content)

    async def address(self, url: str) -> tuple[str, dict]:
        """The URL with an address that was checked in place of its host, and what of a request keeps the host's name."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (ValueError, KeyError):
            raise refused(url, "it is no https: URL") from None
        if not host or parts.username or parts.password:
            raise refused(url, "it must name a host, and no user")
        private = not self.private_hosts.isdisjoint({host, f"{host}:{port}"})
        if parts.scheme != "https" and not private:
            raise refused(url, "only https: is fetched")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise refused(url, "its host is not known") from None
        addresses = [entry[4][0] for entry in found]
        if not private and not all(map(is_public, addresses)):
            raise refused(url, "its host has an address that is not public")
        address = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
        checked = urlunsplit(parts._replace(netloc=f"{address}:{port}", fragment=""))
        named = f"[{host}]" if ":" in host else host
        headers = {"Host": named if parts.port is None else f"{named}:{port}", "Accept-Encoding": "identity"}
        return checked, {"headers": headers, "extensions": {"sni_hostname": host}}

    # Paths

    def open_path(self, url: str) -> UnreadImage:
        if self.folder is None:
            raise refused(url, "this server opens no paths (--allow-local-files FOLDER)", status=403)
        parts = urlsplit(url) if url.startswith("file:") else None
        if parts and parts.netloc not in ("", "localhost"):
            raise refused(url, "a file: URL names no other machine", status=403)
        try:
            path = Path(unquote(parts.path) if parts else url).resolve()
            inside = path.is_relative_to(self.folder)
            # What lies elsewhere and what is not there read alike: nobody learns which files there are.
            if not inside or not stat.S_ISREG(path.stat().st_mode):
                raise FileNotFoundError
            with open(path, "rb") as file:
                facts = os.fstat(file.fileno())
                if is_raster(file.read(16)):
                    return UnreadImage(
                        path.name, str(path), digest_of(path, facts.st_mtime_ns, facts.st_size, facts.st_ino)
                    )
                self.check_size(facts.st_size, path.name)
                file.seek(0)
                return UnreadImage.of_bytes(file.read(self.max_bytes), path.name)
        except (OSError, ValueError, RuntimeError):  # no such file, a name with a null, a circle of links
            raise refused(url, "there is no such file in the folder that this server opens", status=403) from None


@lru_cache(maxsize=4096)
def digest_of(path: Path, modified: int, num_bytes: int, inode: int) -> str:
    """SHA-256 of a raster of many gigabytes, once for as long as it stays as it is."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_public(address: str) -> bool:
    """Whether an address lies in the open internet: not on this machine, in its network, or in a cloud's own."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    for inner in (getattr(ip, "ipv4_mapped", None), getattr(ip, "sixtofour", None)):
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and ip not in NAT64


# Addresses of the other family that a gateway may lead to private ones (RFC 6052).
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def shown(url: str) -> str:
    """Of a URL what an error may show: no secret of its query, no line breaks."""
    return re.sub(r"[^\x20-\x7e]", "?", url.partition("?")[0][:SHOWN])


def refused(url: str, why: str, status=400) -> Refusal:
    name = url[:30] + "..." if url.startswith("data:") else shown(url)
    return Refusal(f"The image {name!r} is not read: {why}.", status, param="messages", code="invalid_image_url")
