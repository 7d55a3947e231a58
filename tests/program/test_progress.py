"""Who asks is told what a compile does, and only while it asks."""

from spcompile.program.progress import begins, shown_by


def test_progress_is_told_to_who_shows_it() -> None:
    told: list[str] = []
    begins("before")
    with shown_by(told.append):
        begins("inside")
    begins("behind")
    assert told == ["inside"]
