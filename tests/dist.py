"""What would be published works: each file of a folder is installed in a clean folder and tried.

``python -m tests.dist dist`` after ``hatchling build``. Dependencies are those of this environment;
the package itself comes from the wheel or the sdist alone.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
INSIDE = (
    "py.typed",
    "tiny/config.json",
    "tiny/model.safetensors",
    "tiny/tokenizer.json",
    "report/templates/report.html",
    "report/templates/report.css",
    "report/templates/report.js",
)
"""Files of the package that are no Python and have to be inside."""

_WHERE = "import tl_loops; print('package', tl_loops.__file__, tl_loops.__version__)"


def example() -> tuple[str, str]:
    """The first example of the README, and what the README says that it prints."""
    found = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", README.read_text("utf-8"), re.S)
    if found is None:
        raise SystemExit("the README has no example with its output")
    return found[1], found[2]


def run(command: list[str], target: Path, folder: Path) -> str:
    """What a command prints, outside of the tree, with the package of ``target`` alone."""
    env = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:60]}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(archive: Path) -> None:
    """Install a wheel or an sdist, and run what a new user would run first.

    Raises:
        SystemExit: Something is missing or does not run; the message says what.
    """
    with tempfile.TemporaryDirectory() as temporary:
        target, folder = Path(temporary) / "installed", Path(temporary) / "elsewhere"
        folder.mkdir()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--no-build-isolation", "--no-compile", "--target", str(target)]
        subprocess.run([*pip, str(archive.resolve())], check=True)
        missing = [name for name in INSIDE if not (target / "tl_loops" / name).is_file()]
        if missing:
            raise SystemExit(f"{archive.name} lacks {', '.join(missing)}")
        if (target / "tests").exists():
            raise SystemExit(f"{archive.name} installs the tests")
        code, shown = example()
        printed = run([sys.executable, "-c", f"{code}\n{_WHERE}"], target, folder)
        before, _, package = printed.rpartition("package ")
        if before.split() != shown.split():
            raise SystemExit(f"{archive.name}: the example of the README prints\n{before}")
        where, version = package.split()
        if not where.startswith(str(target)):
            raise SystemExit(f"{archive.name} was not what ran, but {where}")
        if f"-{version}" not in archive.name:
            raise SystemExit(f"{archive.name} holds version {version}")
        run([sys.executable, str(target / "bin" / "tl-loops"), "--version"], target, folder)
    print(f"{archive.name}: installs, and runs the example of the README")


def check_addresses() -> None:
    """Build a wheel as a release does, which says where it is published, and read that there.

    Raises:
        SystemExit: Its metadata lacks an address.
    """
    site, repository = "https://site.example/tl_loops", "https://code.example/owner/tl_loops"
    addresses = {"TL_LOOPS_SITE_URL": f"{site}/", "TL_LOOPS_REPO_URL": repository}
    expected = {
        f"Project-URL: Documentation, {site}",
        f"Project-URL: Source, {repository}",
        f"Project-URL: Issues, {repository}/issues",
        f"Project-URL: Changelog, {repository}/blob/main/CHANGELOG.md",
    }
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
        quiet = dict(cwd=ROOT, env={**os.environ, **addresses}, capture_output=True, text=True)
        done = subprocess.run(build, **quiet)
        if done.returncode:
            raise SystemExit(done.stderr)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            lines = archive.read(name).decode().splitlines()
    found = {line for line in lines if line.startswith("Project-URL: ")}
    if found != expected:
        raise SystemExit(f"a release would have the addresses {sorted(found)}")
    print("a release says where it is published")


def main() -> None:
    """Check every archive of the folder that the command line names."""
    archives = sorted(Path(sys.argv[1]).glob("*.whl")) + sorted(Path(sys.argv[1]).glob("*.tar.gz"))
    if len(archives) != 2:
        raise SystemExit(f"expected a wheel and an sdist in {sys.argv[1]}, found {archives}")
    for archive in archives:
        check(archive)
    check_addresses()


if __name__ == "__main__":
    main()
