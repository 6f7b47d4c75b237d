"""Look at what a bilinear attentional transform attends to: `dt.viz`.

Arrays first, then pictures of them: where the weights of P and Q lie on the frame, and what one cell of the output is
made of (Chi et al., supplement, section 3). Pictures need pillow (`pip install 'dyreg-triton[viz]'`), arrays do not.
"""

from .arrays import attention_weights, contribution_maps
from .pictures import as_frames, draw_frames, draw_sheet, heat_colors, save
from .recorder import Recorded, record

__all__ = [
    "Recorded",
    "as_frames",
    "attention_weights",
    "contribution_maps",
    "draw_frames",
    "draw_sheet",
    "heat_colors",
    "record",
    "save",
]
