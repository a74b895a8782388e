"""Knows the raw sources and how to fetch and read them: Austen's novels, capitals, elements.

Fetching needs `apt-get` (Debian), `dpkg-deb` and `npm`; reading the novels needs rdata from PyPI.
"""

import bz2
import gzip
import json
import lzma
import struct
import subprocess
import warnings
import zlib
from functools import lru_cache
from pathlib import Path

from demo_data.words import split

AUSTEN = "usr/lib/R/site-library/janeaustenr/data/Rdata"
NOVELS = [
    "emma",
    "mansfieldpark",
    "northangerabbey",
    "persuasion",
    "prideprejudice",
    "sensesensibility",
]
# Names and capitals that have changed since the package was made.
MENDED_NAMES = {"Swaziland": "Eswatini", "Macedonia": "North Macedonia"}
MENDED_CAPITALS = {
    "KZ": "Astana",
    "LY": "Tripoli",
    "SG": "Singapore",
    "UA": "Kyiv",
    "CH": "Bern",
    "LK": "Colombo",
    "BI": "Gitega",
    "PW": "Ngerulmud",
    "MN": "Ulaanbaatar",
    "MM": "Naypyidaw",
    "US": "Washington",
}
# Dependencies, and places whose capital is disputed.
SKIPPED = set(
    split(
        "AI AQ AS AW AX BL BM BQ BV CC CK CW CX EH FK FO GF GG GI GL GP GS GU HK HM IL IM IO JE KY "
        "MF MO MP MQ MS NC NF NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VG VI WF XK YT"
    )
)


def fetch(folder: Path) -> None:
    """Download and unpack the three packages into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "r-cran-janeaustenr"], cwd=folder, check=True)
    package = next(folder.glob("r-cran-janeaustenr*.deb"))
    subprocess.run(["dpkg-deb", "-x", package.name, "austen"], cwd=folder, check=True)
    for name in ("country-list-js@3.1.8", "periodic-table@0.0.8"):
        subprocess.run(["npm", "pack", name], cwd=folder, check=True)
        target = folder / name.split("@")[0]
        target.mkdir(exist_ok=True)
        archive = name.replace("@", "-") + ".tgz"
        subprocess.run(["tar", "xzf", archive, "-C", target.name], cwd=folder, check=True)


def _unpack(blob: bytes) -> bytes:
    """One object of R's lazy-load database: big-endian length, type letter, compressed bytes."""
    (size,) = struct.unpack(">I", blob[:4])
    if blob[4:5] == b"2":
        data = bz2.decompress(blob[5:])
    elif blob[4:5] == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2}]
        data = lzma.decompress(blob[5:], format=lzma.FORMAT_RAW, filters=filters)
    else:
        data = zlib.decompress(blob[4:])
    assert len(data) == size, "R object has another length than it says"
    return data


@lru_cache(maxsize=1)
def novels(folder: Path) -> dict[str, list[str]]:
    """The lines of each novel, by R's name for it."""
    import rdata

    base = folder / "austen" / AUSTEN
    read = lambda data: rdata.conversion.convert(rdata.parser.parse_data(data))  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = read(gzip.decompress(base.with_suffix(".rdx").read_bytes()))
        database = base.with_suffix(".rdb").read_bytes()
        spans = {n: (int(s), int(z)) for n, (s, z) in index["variables"].items()}
        return {
            n: [str(x) for x in read(_unpack(database[spans[n][0] : sum(spans[n])]))]
            for n in NOVELS
        }


@lru_cache(maxsize=1)
def countries(folder: Path) -> list[tuple[str, str, str]]:
    """(country, capital, continent), sorted."""
    data = folder / "country-list-js" / "package" / "data"
    names, capitals, places, continents = (
        json.loads((data / f"{n}.json").read_text())
        for n in ("names", "capital", "continent", "continents")
    )
    rows = []
    for code, name in names.items():
        capital = MENDED_CAPITALS.get(code, capitals.get(code, "")).strip()
        if capital and code not in SKIPPED:
            rows.append((MENDED_NAMES.get(name, name).strip(), capital, continents[places[code]]))
    return sorted(rows)


@lru_cache(maxsize=1)
def elements(folder: Path) -> list[tuple[int, str, str]]:
    """(number, symbol, name) of the first 100 elements."""
    rows = json.loads((folder / "periodic-table" / "package" / "data.json").read_text())
    return [(r["atomicNumber"], r["symbol"], r["name"]) for r in rows if r["atomicNumber"] <= 100]
