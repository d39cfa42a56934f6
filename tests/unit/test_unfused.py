"""Which attention kernels may run is a choice of the whole process: threads must not leave theirs behind."""

from threading import Event, Thread

from torch.backends import cuda

from gmeta.meta.unfused import unfused_attention


def kernels() -> tuple[bool, ...]:
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


def test_threads_that_overlap_leave_the_kernels_as_they_were() -> None:
    usual = kernels()
    first_in, second_in, first_out = Event(), Event(), Event()
    seen = []

    def first() -> None:
        with unfused_attention():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with unfused_attention():
            second_in.set()
            first_out.wait(10)
            seen.append(kernels())

    threads = [Thread(target=first), Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert usual[0]
    assert seen == [(False, False, True)]  # the one that is still inside
    assert kernels() == usual
