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
        "cifar10",
        "tanglenas_datasets.cifar:CIFAR10",
        summary="60,000 pictures in colour, 32x32, 10 classes",
    )
    register(
        "cifar100",
        "tanglenas_datasets.cifar:CIFAR100",
        summary="60,000 pictures in colour, 32x32, 100 classes",
    )
    image_folder = "tanglenas_datasets.image_folder:ImageFolder"
    register(
        "image_folder",
        image_folder,
        summary="your own images, one folder for each class",
    )
    register(
        "imagenet",
        image_folder,
        summary="ImageNet as folders of images, 1,000 classes",
        image_size=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_pct=0.875,
        crop_scale=(0.08, 1.0),
        flip=True,
        num_classes=1000,
        test_folder="val",
        check=False,
    )
    # NAS-Bench-201 (arXiv:2001.00326) trains with this normalisation and shift.
    register(
        "imagenet16_120",
        image_folder,
        summary="ImageNet16-120 of NAS-Bench-201 as folders of images, 16x16, 120 classes",
        image_size=16,
        mean=(0.4811, 0.4575, 0.4079),
        std=(0.2479, 0.2402, 0.2553),
        shift=2,
        flip=True,
        num_classes=120,
        test_folder="val",
    )
    register(
        "text",
        "tanglenas_datasets.text:Text",
        summary="your own text, a file or a folder, by characters or byte pairs",
    )
    register(
        "stdlib_text",
        "tanglenas_datasets.text:StdlibText",
        summary="source code of Python's standard library, a text that every machine has",
    )
