"""What a server says of itself in its first message: the world that is played, and the limits."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue


class Message(BaseModel):
    """What is said; a reader ignores fields that it does not know."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class WorldInfo(Message):
    """What is played."""

    name: str
    """Of the world's folder."""
    title: str
    """What it is, by its card; empty: it has none."""
    trained: str
    """How, in words that go on after "trained"; empty: nobody has said it."""
    goal: str
    """What a player may try, by its card; empty: nothing. Nothing is scored."""
    parameters: int
    """Of its model."""
    weights: str
    """Digest of their file, by which a link to a moment knows them; empty: none, or a large one."""
    height: int
    """Rows of a frame."""
    width: int
    """Columns of a frame."""
    pixel_art: bool
    """Whether enlarged frames keep their edges hard."""
    actions: tuple[str, ...]
    """Name of each action, or of each entry of the vector; empty: nothing steers this world."""
    action_dim: int
    """Entries of an action that is a vector; 0: actions are numbers."""
    action_parts: tuple[dict[str, JsonValue], ...]
    """What the vector consists of, as `ActionPart` says it; empty: of no parts."""
    key_map: tuple[dict[str, JsonValue], ...]
    """Which controls do what, as `scd.data.keymap.Binding` says it."""
    num_labels: int
    """Classes of streams; 0: none."""
    takes_prompt: bool
    """Whether a text steers it, in words."""
    prompt: str
    """Of streams that bring none; empty: they must."""
    pictures_per_frame: int
    """Pictures of a frame but the first, which has one: 4 of a world of Wan's latents."""
    separable: bool
    """Whether it is a separable model."""
    default_steps: int
    """Denoising steps per frame unless told otherwise."""
    fps: float
    """Frames per second at which it is meant to be watched."""
    clips: int
    """Clips that it carries to begin from."""
    needs_start: bool
    """Whether a stream must begin with given frames."""
    begins_from_nothing: bool
    """Whether it was taught to make a first frame; one that was not may show nothing but stripes
    where a stream begins so."""
    guidance: tuple[str, ...]
    """Kinds of guidance that it can give, "none" among them."""


class Limits(Message):
    """What the server allows; fields as in `scd.serving.settings`."""

    max_message_bytes: int
    messages_per_s: float
    max_steps: int
    max_step_count: int
    max_fps: float
    queue_frames: int
    history_frames: int
    max_upload_bytes: int
    max_upload_pixels: int
    max_upload_s: float
    max_snapshot_bytes: int
