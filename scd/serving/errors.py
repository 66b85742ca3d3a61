"""What can go wrong with a session that is served, each with a short code for machines."""

from __future__ import annotations

from typing import ClassVar


class PlayError(ValueError):
    """A request that cannot be obeyed; the session, if there is one, is as it was."""

    code: ClassVar[str] = "bad_request"
    """For machines; it never changes."""


class BadRequest(PlayError):
    """Words that do not fit the world, the limits, or what the session is doing."""


class UnknownSession(PlayError):
    """There is no such session, or it was deleted."""

    code = "unknown_session"


class SessionBusy(PlayError):
    """Another client is attached."""

    code = "session_busy"


class SessionStopped(PlayError):
    """A fault has ended the session."""

    code = "session_stopped"


class TooManySessions(PlayError):
    """There is no room for one more now; later there may be."""

    code = "too_many_sessions"


class OutOfHistory(PlayError):
    """A frame that is not kept, or not yet made."""

    code = "out_of_history"


class BadSnapshot(PlayError):
    """A file that is no snapshot, is damaged, or is of another world or engine."""

    code = "bad_snapshot"


class Superseded(PlayError):
    """Frames that were asked for will not come: the session was reset or rewound meanwhile."""

    code = "superseded"


class Overloaded(PlayError):
    """More is waiting than a bounded queue holds; try again later."""

    code = "overloaded"


class HostStopped(PlayError):
    """The thread that owns the model has ended: nothing is obeyed any more."""

    code = "model_stopped"
