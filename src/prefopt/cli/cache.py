"""`prefopt cache`: what the caches hold, and room where it is wanted."""

from pathlib import Path

from pydantic import model_validator

from prefopt.cli.flags import settings_app
from prefopt.config import Setting, Settings


class CacheSettings(Settings):
    """What can be said about the caches."""

    cache_dir: Path | None = Setting(None, help="Folder of the caches; the default is ~/.cache/prefopt or $PREFOPT_CACHE.")
    prune: bool = Setting(False, help="Remove what no run has used for `older_than_days`; it is made anew when it is needed.")
    older_than_days: float = Setting(30.0, ge=0, le=36500, help="Days without use after which `prune` removes an entry; 0: all.")

    @model_validator(mode="after")
    def _days_are_for_pruning(self) -> "CacheSettings":
        if "older_than_days" in self.model_fields_set and not self.prune:
            raise ValueError("older_than_days says what prune removes: give prune too")
        return self


def run(settings: CacheSettings) -> None:
    """Say what there is, and remove what nobody uses."""
    from prefopt.data.cache import cache_folder, prune, report

    folder = cache_folder(settings.cache_dir)
    if settings.prune:
        print(prune(folder, settings.older_than_days))
    for line in report(folder):
        print(line)


app = settings_app("cache", CacheSettings, run, usage="cache [FLAGS]")
