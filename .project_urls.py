"""Project URLs of what is published: the two addresses that the site is built with.

A release sets both (CONTRIBUTING.md); without them nothing is claimed.
"""

import os
from collections.abc import Mapping
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def project_urls(environment: Mapping[str, str]) -> dict[str, str]:
    """Project URLs by their well-known labels, from ``TL_LOOPS_SITE_URL`` and ``_REPO_URL``."""
    site = environment.get("TL_LOOPS_SITE_URL", "").rstrip("/")
    repository = environment.get("TL_LOOPS_REPO_URL", "").rstrip("/")
    urls = {"Documentation": site, "Source": repository}
    if repository:
        urls["Changelog"] = f"{repository}/blob/main/CHANGELOG.md"
        urls["Issues"] = f"{repository}/issues"
    return {label: url for label, url in urls.items() if url}


class ProjectUrls(MetadataHookInterface):
    """Gives hatchling the field that pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the URLs to the metadata."""
        metadata["urls"] = project_urls(os.environ)
