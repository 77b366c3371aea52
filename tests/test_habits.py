"""What a newcomer types first: `make` says what there is, hooks run what `make check` does."""

import re
import subprocess
from pathlib import Path

PROJECT = Path(__file__).parent.parent
MAKEFILE = (PROJECT / "Makefile").read_text()


def test_make_alone_names_every_target() -> None:
    phony = re.search(r"(?m)^\.PHONY: (.+)$", MAKEFILE)
    assert phony is not None
    shown = subprocess.run(["make"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    lines = dict(re.findall(r"(?m)^make (\S+) +(\S.*)$", shown))
    assert sorted(lines) == sorted(phony[1].split())
    assert all(len(line) <= 100 for line in shown.splitlines()), shown


def test_hooks_run_what_check_does() -> None:
    """By the tools of .venv, so that a commit needs no network."""
    config = (PROJECT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"repo: (\S+)", config)) == {"local"}
    assert set(re.findall(r"language: (\S+)", config)) == {"system"}
    for entry in re.findall(r"entry: \.venv/bin/(\w+(?: [a-z]+)?)", config):
        assert f"$(BIN)/{entry}" in MAKEFILE, entry


def test_a_report_of_security_is_not_sent_to_the_issues() -> None:
    assert "SECURITY.md" in (PROJECT / ".github/ISSUE_TEMPLATE/bug.md").read_text()
    assert "SECURITY.md" in (PROJECT / "CONTRIBUTING.md").read_text()
