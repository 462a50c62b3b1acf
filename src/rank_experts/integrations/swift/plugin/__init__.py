"""The folder that ms-swift puts on the import path; it holds one file, whose name no other module has."""
