"""What the recipes share whose moments follow the frame."""

from typing import Any

from ..codecs import Full
from ..residual import Feedback
from ..transport import Rotate

FOLLOWING: dict[str, Any] = dict(transport=Rotate(), residual=Feedback(), codec=Full(), refresh_every=4, scale="match")
"""With error feedback; a "+ef" makes no difference to them."""
