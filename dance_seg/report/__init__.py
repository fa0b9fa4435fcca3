"""What a run came to, on one self-contained page, and several runs side by side.

`runs` reads run folders; `run_page` and `comparison_page` say what a page shows, `charts` and `pictures` draw it,
`page` renders it: no scripts, nothing fetched, everything from files escaped.
"""
