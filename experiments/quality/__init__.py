"""What only trained weights show: how near quantised ones come, which drafts are accepted, how far a context goes."""
