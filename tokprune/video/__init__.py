"""From a video file, a folder of pictures or an animation to the right frames, with exact indices and true
timestamps."""

from tokprune.video.index import Index, PacketIndex
from tokprune.video.job import VideoError
from tokprune.video.reader import BACKENDS, read_video, scan
from tokprune.video.result import Video

__all__ = ["BACKENDS", "Index", "PacketIndex", "Video", "VideoError", "read_video", "scan"]
