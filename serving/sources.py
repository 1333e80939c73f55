"""Where the image of a request may come from: the one place that says what a stranger may make the server open.

- `data:` URLs, as the URL standard reads them.
- https URLs whose host has public addresses alone. The connection goes to the addresses that were checked, one after the
  other, not to the name once more, and every redirect is checked anew. GDAL never opens a URL of a request.
- Where the server was started with a folder: `file:` URLs and absolute paths below it, symbolic links resolved first.

A picture is opened from its bytes, so nothing that it names is opened. A TIFF or JPEG 2000 of the folder is read from
where it lies, some rows at a time; formats that name other files, as VRT, are never opened.
"""

import asyncio
import base64
import ipaddress
import os
import re
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit, urlunsplit

from ..image_raster_files_uhr_bat import is_raster
from .digests import DIGESTS
from .front import ImageFile
from .refusals import Refusal

# Redirects of a URL that are followed.
MAX_REDIRECTS = 3
# Seconds for a whole image to arrive from elsewhere.
FETCH_SECONDS = 30
# Of them for a connection to one of a host's addresses, before the next one is tried.
CONNECT_SECONDS = 5
# Letters of a data: URL that are decoded at a time: every escape among them takes many times its own bytes.
DECODED_LETTERS = 2**20
# What the URL standard removes from the ends of a URL, and inside it.
BLANKS = "".join(map(chr, range(0x21)))
LINE_BREAKS = str.maketrans("", "", "\t\n\r")
# Threads for what images alone need: a slow disk or a slow server of names holds up no question without one.
FILES = ThreadPoolExecutor(8, thread_name_prefix="files")
NAMES = ThreadPoolExecutor(16, thread_name_prefix="names")
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

    async def read(self, url: str) -> ImageFile:
        """The image that a request names.

        Raises:
            Refusal: it may not be opened, is too large or cannot be had.
        """
        url = url.strip(BLANKS)
        scheme = url[:SHOWN].partition(":")[0].lower()
        if scheme == "data":
            return await _on(FILES, self.decode, url)
        if scheme in ("http", "https"):
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    content = await self.fetch(url)
            except TimeoutError:
                raise refused(url, f"it did not arrive within {FETCH_SECONDS} seconds") from None
            return await _on(FILES, ImageFile.of_bytes, content, shown(url))
        if scheme == "file" or url.startswith("/"):
            found = await _on(FILES, self.find, url)
            if isinstance(found, ImageFile):
                return found
            try:
                return await _on(FILES, ImageFile.of_file, found, await DIGESTS.wait_for(found))
            except OSError:
                raise not_there(url) from None
        raise refused(url, "it must be a data: URL, an https: URL or, where the server allows it, a path")

    # In the request itself

    def decode(self, url: str) -> ImageFile:
        """The bytes of a data: URL (https://fetch.spec.whatwg.org/#data-url-processor)."""
        header, comma, payload = url.translate(LINE_BREAKS).partition("#")[0].partition(",")
        if not comma:
            raise refused(url, "a data: URL is data:image/...;base64,...")
        try:
            content = percent_decoded(payload)
            if re.search(r"; *base64\s*$", header, re.I | re.A):
                content = content.translate(None, b"\t\n\f\r ")
                self.check_size(len(content) * 3 // 4, "image")
                content = forgiving_base64(content)
        except ValueError as error:
            raise refused(url, f"it is not base64 ({error})") from error
        self.check_size(len(content), "image")
        return ImageFile.of_bytes(content)

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
        timeout = httpx.Timeout(FETCH_SECONDS, connect=CONNECT_SECONDS)
        async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=timeout) as client:
            for _ in range(MAX_REDIRECTS + 1):
                try:
                    response = await self.reach(client, url)
                    try:
                        if not response.has_redirect_location:
                            return await self.receive(response, url)
                        url = str(httpx.URL(url).join(response.headers["Location"]))
                    finally:
                        await response.aclose()
                except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                    raise refused(url, f"it cannot be fetched ({type(error).__name__})") from error
        raise refused(url, f"it is redirected more than {MAX_REDIRECTS} times")

    async def reach(self, client, url):
        """What the first address of the host that can be connected to answers, before its body."""
        import httpx

        checked, options = await self.addresses(url)
        for left, address in enumerate(checked, 1 - len(checked)):
            try:
                return await client.send(client.build_request("GET", address, **options), stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if not left:
                    raise

    async def receive(self, response, url) -> bytes:
        if response.status_code != 200:
            nowhere = " without a Location" if response.is_redirect else ""
            raise refused(url, f"its server answers {response.status_code}{nowhere}")
        stated = response.headers.get("Content-Length", "")
        self.check_size(int(stated) if stated.isdecimal() else 0, shown(url))
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            self.check_size(len(content), shown(url))
        return bytes(content)

    async def addresses(self, url: str) -> tuple[list[str], dict]:
        """The URL with each address of its host in place of the name, all of them checked, and what of a request keeps the
        name."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
            if host and not host.isascii():
                host = host.encode("idna").decode("ascii")
        except (ValueError, KeyError):
            raise refused(url, "it is no https: URL") from None
        if not host or parts.username or parts.password:
            raise refused(url, "it must name a host, and no user")
        private = not self.private_hosts.isdisjoint({host, f"{host}:{port}"})
        if parts.scheme != "https" and not private:
            raise refused(url, "only https: is fetched")
        try:
            addresses = await _on(NAMES, look_up, host, port)
        except (OSError, UnicodeError):
            raise refused(url, "its host is not known") from None
        if not private and not all(map(is_public, addresses)):
            raise refused(url, "its host has an address that is not public")
        places = [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses]
        checked = [urlunsplit(parts._replace(netloc=place, fragment="")) for place in places]
        named = f"[{host}]" if ":" in host else host
        headers = {"Host": named if parts.port is None else f"{named}:{port}", "Accept-Encoding": "identity"}
        return checked, {"headers": headers, "extensions": {"sni_hostname": host}}

    # Paths

    def open_path(self, url: str) -> ImageFile:
        """What `read` gives for a path."""
        found = self.find(url)
        return found if isinstance(found, ImageFile) else ImageFile.of_file(found)

    def find(self, url: str) -> ImageFile | Path:
        """A picture, or the path of a raster that is to be read where it lies."""
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
                if is_raster(file.read(16)):
                    return path
                self.check_size(os.fstat(file.fileno()).st_size, path.name)
                file.seek(0)
                return ImageFile.of_bytes(file.read(self.max_bytes), path.name)
        except (OSError, ValueError, RuntimeError):  # no such file, a name with a null, a circle of links
            raise not_there(url) from None


async def _on(threads, function, *args):
    return await asyncio.get_running_loop().run_in_executor(threads, function, *args)


def look_up(host: str, port: int) -> list[str]:
    """The addresses of a host. Raises `OSError` for one that is not known."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(entry[4][0] for entry in found))


def percent_decoded(text: str) -> bytes:
    """What `unquote_to_bytes` returns, in little memory however many escapes there are."""
    if "%" not in text:
        return text.encode()
    content, start = bytearray(), 0
    while start < len(text):
        end = start + DECODED_LETTERS
        cut = text.find("%", max(start, end - 2), end)  # no escape is cut in two
        end = cut if cut > start else end
        content += unquote_to_bytes(text[start:end])
        start = end
    return bytes(content)


def forgiving_base64(content: bytes) -> bytes:
    """Bytes of base64 without white space, padded or not (https://infra.spec.whatwg.org/#forgiving-base64-decode).

    Raises:
        ValueError: it is none.
    """
    if len(content) % 4 == 0 and content.endswith(b"="):
        content = content[: -2 if content.endswith(b"==") else -1]
    if len(content) % 4 == 1:
        raise ValueError(f"{len(content)} letters without padding: one is missing, or one is too many")
    if b"-" in content or b"_" in content:
        raise ValueError("its letters - and _ are of the alphabet for names and URLs; here they are + and /")
    return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)


# All that is given out of IPv6 (IANA, "IPv6 Global Unicast Address Assignments"): addresses that hold one of IPv4 for a
# gateway (::a.b.c.d, ::ffff:0:a.b.c.d, 64:ff9b::/96, 64:ff9b:1::/48) and those of a site (fec0::/10) lie elsewhere.
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
# Of IANA's registries of special addresses, what some supported Python takes for public.
SPECIAL = [ipaddress.ip_network(network) for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20")]


def is_public(address: str) -> bool:
    """Whether an address lies in the open internet: not on this machine, in its network, or in a cloud's own."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    for inner in (getattr(ip, "ipv4_mapped", None), getattr(ip, "sixtofour", None)):
        if inner is not None:
            return is_public(str(inner))
    if ip.version == 6 and ip not in GLOBAL_IPV6:
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in SPECIAL)


def shown(url: str) -> str:
    """Of a URL what an error may show: no secret of its query, no line breaks."""
    return re.sub(r"[^\x20-\x7e]", "?", url.partition("?")[0][:SHOWN])


def not_there(url: str) -> Refusal:
    return refused(url, "there is no such file in the folder that this server opens", status=403)


def refused(url: str, why: str, status=400) -> Refusal:
    name = url[:30] + "..." if url.startswith("data:") else shown(url)
    return Refusal(f"The image {name!r} is not read: {why}.", status, param="messages", code="invalid_image_url")
