"""The memory pages (HTML, CSS, JavaScript); a package so that they are installed with it."""
