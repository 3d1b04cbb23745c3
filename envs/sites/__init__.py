"""Tasks on pages that look like the web: an office and a shop (gentelella), and a dashboard of another look (sb-admin-2).

The pages are packages of npm under licences of their own (`packages.py`); nothing is fetched unless asked:
`python -m envs.sites install`. `SITES` names the tasks; those called memory-... need on one page what another showed.
"""

from . import across, office
from .packages import SitesMissing
from .task import Site, SiteTask

SITES: dict[str, Site] = office.TASKS | across.TASKS

__all__ = ["SITES", "Site", "SiteTask", "SitesMissing"]
