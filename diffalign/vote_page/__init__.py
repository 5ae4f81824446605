"""The page on which people vote: what is shown, the sessions of the raters, and the app that serves them."""
