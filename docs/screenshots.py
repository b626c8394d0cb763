"""Pictures of a run's report for docs/report.md: python docs/screenshots.py RUN [FOLDER]. Needs chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from spalign.pipeline.report import write_report

LOOKS = {"desktop": ((1280, 1500), "1"), "dark": ((1280, 1500), "0"), "phone": ((500, 1500), "1")}
"""Window in pixels; whether a light page is preferred."""


def main(run: Path, out: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("no chromium here: apt-get install chromium")
    page = write_report(run).resolve()
    for name, ((width, height), light) in LOOKS.items():
        with tempfile.TemporaryDirectory() as profile:
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
            look = [f"--blink-settings=preferredColorScheme={light}", f"--window-size={width},{height}"]
            picture = out / f"report-{name}.png"
            subprocess.run([browser, *flags, *look, f"--screenshot={picture.resolve()}", page.as_uri()], check=True, capture_output=True)
            print(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent / "pictures"))
