"""What we know of each model family, found by structure and never by importing its package.

`families.py` holds one record per family, `find.py` asks them, `spec.py` is the form of the answer.
"""

from svp_peft.backbones.find import find_backbone
from svp_peft.backbones.spec import BackboneSpec, ClassTokens, Layout, class_token_positions

__all__ = ["BackboneSpec", "ClassTokens", "Layout", "class_token_positions", "find_backbone"]
