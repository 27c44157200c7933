"""Values that a notebook shows as what they are: a line of facts, a picture, a table."""


class Displayed:
    """A value whose display `tvlens.notebook` makes, once a notebook asks for it."""

    def _repr_html_(self) -> str:
        # Displays know all values, and are loaded when the first of them is shown.
        from tvlens import notebook

        return notebook.html(self)
