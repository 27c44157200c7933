from .attention import show_attention as show_attention
from .attention import show_tokens as show_tokens
from .displays import html as html
from .pieces import Shown as Shown
