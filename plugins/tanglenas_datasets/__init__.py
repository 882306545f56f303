"""Datasets of images and of text."""

from tanglenas_engine import hookimpl


@hookimpl
def tanglenas_register_datasets(register):
    register(
        "digits",
        "tanglenas_datasets.digits:Digits",
        summary="1,797 handwritten digits of 8x8, with scikit-learn",
    )
    register(
        "fashion_mnist",
        "tanglenas_datasets.fashion_mnist:FashionMNIST",
        summary="70,000 pictures of clothes, 28x28, 10 classes",
    )
    register(
        "image_folder",
        "tanglenas_datasets.image_folder:ImageFolder",
        summary="your own images, one folder for each class",
    )
    register(
        "text",
        "tanglenas_datasets.text:Text",
        summary="your own text, a file or a folder, by characters or byte pairs",
    )
    register(
        "stdlib_text",
        "tanglenas_datasets.text:StdlibText",
        summary="source code of Python's standard library: text that is on every machine",
    )
