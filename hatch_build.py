"""Build hook: a wheel carries a summary of the evidence (see `quantmatrix.packaged`)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SummaryHook(BuildHookInterface[Any]):
    """Adds `quantmatrix/reports/` to a wheel; an editable install reads the checkout itself."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the summary beside the build and name it."""
        if version == "editable":
            return
        root = Path(self.root)
        sys.path.insert(0, str(root / "src"))
        from quantmatrix.proof import packaged

        self.folder = tempfile.TemporaryDirectory(prefix="quantmatrix-reports-")
        packaged.write_folder(root / "reports", Path(self.folder.name))
        build_data["force_include"][self.folder.name] = "quantmatrix/reports"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was written."""
        if version != "editable":
            self.folder.cleanup()
