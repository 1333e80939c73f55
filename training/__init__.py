import export  # noqa: F401 - registers the model code as the package uhr_bat
