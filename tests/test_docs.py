"""README.md and docs/: links, commands and diffs hold."""

import glob
import os
import re

from tests.common import HERE, flags_of, test

PAGES = ["README.md", *(os.path.relpath(page, HERE)
                        for page in sorted(glob.glob(os.path.join(HERE, "docs", "*.md"))))]


def read(name):
    """The text of a file, from the folder of the scripts."""
    with open(os.path.join(HERE, name), encoding="utf-8") as f:
        return f.read()


def fences(text):
    """[(language, text)] of a page's fenced blocks."""
    return re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.M | re.S)


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    found, text = set(), re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.M | re.S)
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # of a link its text
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(next(n for n in (name, *(f"{name}-{i}" for i in range(1, 99))) if n not in found))
    return found


def commands(page):
    """[[script, word, ...]] of all `python X.py ...` and torchrun commands on a page."""
    found = []
    text = re.sub(r"\\\n\s*", " ", read(page))  # lines that go on
    text = re.sub(r"&lt;|&gt;", "", text)
    spans = [line for _, block in fences(text) for line in block.splitlines()]
    spans += re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
    for span in spans:
        for part in re.split(r"&&|;|\||#", span):
            match = re.search(r"\b(?:python3?|torchrun) (?:[^`]*? )?([\w/.]+\.py)\b(.*)", part)
            if match:
                found.append([match[1], *match[2].split()])
    return found


@test
def test_links_resolve():
    """Every relative link of README.md and docs/ names a file and a heading that exist."""
    for page in PAGES:
        text = re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.M | re.S)
        links = re.findall(r"\]\(([^)\s]+)[^)]*\)", re.sub(r"`[^`\n]*`", "", text))
        links += re.findall(r'(?:src|href)="([^"]+)"', text)
        for link in links:
            if re.match(r"\w+:", link):
                continue
            target, _, anchor = link.partition("#")
            path = os.path.normpath(os.path.join(os.path.dirname(page), target)) if target else page
            assert os.path.exists(os.path.join(HERE, path)), f"{page}: {link}: no such file"
            known = not anchor or anchor in anchors(path)
            assert known, f"{page}: {link}: no such heading in {path}"


@test
def test_commands_exist():
    """Every command of README.md and docs/ names a script that exists and flags that it has."""
    seen = 0
    for page in PAGES:
        for script, *words in commands(page):
            path = os.path.join(HERE, script)
            assert os.path.exists(path), f"{page}: {script}: no such file"
            word = [w for w in words[:1] if re.fullmatch(r"[a-z]+", w)]
            command = word if script in ("data.py", "bench.py") else []
            for flag in (w.split("=")[0] for w in words if re.match(r"--\w", w)):
                seen += 1
                known = flag[2:] in flags_of(script, *command)
                assert known, f"{page}: {' '.join([script, *words])}: no flag {flag}"
    assert seen > 20, "no commands were found"


@test
def test_hacking_diffs_apply():
    """Each line that README's worked diffs remove stands in the file that they name."""
    text = read("README.md")
    section = re.search(r"^## +How to hack it.*?(?=^## |\Z)", text, re.M | re.S)
    assert section, "README.md has no section `How to hack it`"
    diffs = [block for language, block in fences(section[0]) if language == "diff"]
    assert len(diffs) >= 3, f"{len(diffs)} diffs"
    for block in diffs:
        name = None
        for line in block.splitlines():
            if title := re.match(r"(?:# |--- )(?:a/)?([\w/]+\.py)\b", line):
                name, lines = title[1], {row.strip() for row in read(title[1]).splitlines()}
            elif line.startswith("-") and not line.startswith("---") and line[1:].strip():
                assert name, f"a diff names no file: {block}"
                assert line[1:].strip() in lines, f"{name} has no line {line[1:].strip()!r}"


@test
def test_readme_is_short():
    """README.md has at most 220 lines."""
    assert len(read("README.md").splitlines()) <= 220
