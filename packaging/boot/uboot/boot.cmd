# Boot script of twinboot for U-Boot: two slots, RAUC's variables. README.md says how to use it.
#
# BOOT_ORDER names the slots in the order in which they are tried, BOOT_A_LEFT and BOOT_B_LEFT how
# many boots each has left. The first one with boots left is taken, one is taken off and saved, and
# only then the slot is loaded: one that was to be tried once is out, whatever happens now. Nothing
# in here waits for a key: what fails ends in a reset.
#
# U-Boot says where it found this file: devtype, devnum, distro_bootpart, prefix. Numbers are
# hexadecimal throughout, as U-Boot's commands take them.

# Partitions by their GPT labels.
setenv tb_label_env ubootenv
setenv tb_label_A rootfs-a
setenv tb_label_B rootfs-b
# Boots that the slots get when none has any left.
setenv tb_refill 3
setenv tb_vars BOOT_ORDER BOOT_A_LEFT BOOT_B_LEFT

# ---- The board's own settings, from the partition with this script ----------------------------

setenv board_args
if load ${devtype} ${devnum}:${distro_bootpart} ${kernel_addr_r} ${prefix}board.env; then
    env import -t ${kernel_addr_r} ${filesize} board_args
fi

# ---- The environment that Linux shares --------------------------------------------------------
#
# Two copies of 8 KiB, 1 MiB apart, in a partition without a file system; fw_env.config tells Linux
# the same. Each copy is a checksum of 4 bytes, a number of 1 byte that grows with every write, and
# NAME=value strings. The older copy is the one that is written, so a power cut leaves the newer one.
# It is what U-Boot calls a redundant environment. A U-Boot that was not built for one knows it
# without the number (tb_head is 4, not 5), so checksum and strings are moved together for it.
setenv tb_blocks 10
setenv tb_distance 800
setenv tb_data_size 1ffb

setexpr tb_0 ${kernel_addr_r} + 0
setexpr tb_1 ${kernel_addr_r} + 4000
setexpr tb_work ${kernel_addr_r} + 8000
setexpr tb_peek ${tb_work} + 4
setenv BOOT_ORDER x
env export -c -s 100 ${tb_work} BOOT_ORDER
setexpr.b tb_head *${tb_peek}
if test ${tb_head} = 42; then setenv tb_head 4; else setenv tb_head 5; fi
setexpr tb_work_data ${tb_work} + ${tb_head}
setexpr tb_work_size ${tb_data_size} + ${tb_head}

# Reads the copy at tb_at in memory into the variables; fails if its checksum is wrong.
setenv tb_import 'setexpr tb_data ${tb_at} + 5; cp.b ${tb_at} ${tb_work} 4; cp.b ${tb_data} ${tb_work_data} ${tb_data_size}; env import -c ${tb_work} ${tb_work_size} ${tb_vars}'
# Makes it from the variables, with the number tb_number.
setenv tb_export 'setexpr tb_data ${tb_at} + 5; setexpr tb_number_at ${tb_at} + 4; env export -c -s ${tb_work_size} ${tb_work} ${tb_vars}; cp.b ${tb_work} ${tb_at} 4; mw.b ${tb_number_at} ${tb_number}; cp.b ${tb_work_data} ${tb_data} ${tb_data_size}'

setenv tb_valid_0
setenv tb_valid_1
${devtype} dev ${devnum}
part start ${devtype} ${devnum} ${tb_label_env} tb_block_0
setexpr tb_block_1 ${tb_block_0} + ${tb_distance}
if ${devtype} read ${tb_0} ${tb_block_0} ${tb_blocks}; then
    setenv tb_at ${tb_0}
    if run tb_import; then setenv tb_valid_0 1; fi
fi
if ${devtype} read ${tb_1} ${tb_block_1} ${tb_blocks}; then
    setenv tb_at ${tb_1}
    if run tb_import; then setenv tb_valid_1 1; fi
fi

# The newer one counts: the larger number, and 0 after ff.
setexpr tb_peek ${tb_0} + 4
setexpr.b tb_number_0 *${tb_peek}
setexpr tb_peek ${tb_1} + 4
setexpr.b tb_number_1 *${tb_peek}
setenv tb_current
if test -n "${tb_valid_0}"; then setenv tb_current 0; fi
if test -n "${tb_valid_1}"; then
    if test -z "${tb_valid_0}"; then
        setenv tb_current 1
    elif test ${tb_number_0} = ff -a ${tb_number_1} = 0; then
        setenv tb_current 1
    elif test ${tb_number_0} = 0 -a ${tb_number_1} = ff; then
        setenv tb_current 0
    elif itest.b ${tb_number_1} > ${tb_number_0}; then
        setenv tb_current 1
    fi
fi

setenv BOOT_ORDER
setenv BOOT_A_LEFT
setenv BOOT_B_LEFT
if test "${tb_current}" = 0; then
    setenv tb_at ${tb_0}
    run tb_import
    setenv tb_next_at ${tb_1}
    setenv tb_next_block ${tb_block_1}
    setexpr.b tb_number ${tb_number_0} + 1
elif test "${tb_current}" = 1; then
    setenv tb_at ${tb_1}
    run tb_import
    setenv tb_next_at ${tb_0}
    setenv tb_next_block ${tb_block_0}
    setexpr.b tb_number ${tb_number_1} + 1
else
    echo "twinboot: no copy of the environment can be read, every slot may boot again"
    setenv tb_next_at ${tb_0}
    setenv tb_next_block ${tb_block_0}
    setenv tb_number 0
fi

# ---- Which slot -------------------------------------------------------------------------------

# What is missing: as at the first start.
test -n "${BOOT_ORDER}" || setenv BOOT_ORDER A B
test -n "${BOOT_A_LEFT}" || setenv BOOT_A_LEFT ${tb_refill}
test -n "${BOOT_B_LEFT}" || setenv BOOT_B_LEFT ${tb_refill}

setenv tb_slot
setenv tb_choose 'for tb_name in ${BOOT_ORDER}; do if test -n "${tb_slot}"; then true; elif test ${tb_name} = A; then if test 0x${BOOT_A_LEFT} -gt 0; then setexpr BOOT_A_LEFT ${BOOT_A_LEFT} - 1; setenv tb_slot A; fi; elif test ${tb_name} = B; then if test 0x${BOOT_B_LEFT} -gt 0; then setexpr BOOT_B_LEFT ${BOOT_B_LEFT} - 1; setenv tb_slot B; fi; fi; done'
run tb_choose
if test -z "${tb_slot}"; then
    # Only those in the order: a slot that must not boot is not in it.
    echo "twinboot: no slot has boots left, all in the order get ${tb_refill}"
    setenv BOOT_A_LEFT ${tb_refill}
    setenv BOOT_B_LEFT ${tb_refill}
    run tb_choose
fi
if test -z "${tb_slot}"; then
    echo "twinboot: BOOT_ORDER=${BOOT_ORDER} names no slot, it is A B again"
    setenv BOOT_ORDER A B
    run tb_choose
fi

setenv tb_at ${tb_next_at}
run tb_export
if ${devtype} write ${tb_next_at} ${tb_next_block} ${tb_blocks}; then
    true
else
    echo "twinboot: the environment cannot be written, this boot is not counted"
    # One that was to be tried once could be tried for ever: the other slot in the order boots.
    for tb_name in ${BOOT_ORDER}; do
        if test ${tb_slot} = A -a ${tb_name} = B -a 0x${BOOT_A_LEFT} -eq 0 -a 0x${BOOT_B_LEFT} -gt 0; then
            setenv tb_slot B
        elif test ${tb_slot} = B -a ${tb_name} = A -a 0x${BOOT_B_LEFT} -eq 0 -a 0x${BOOT_A_LEFT} -gt 0; then
            setenv tb_slot A
        fi
    done
fi

# ---- Boot it ----------------------------------------------------------------------------------

echo "twinboot: booting slot ${tb_slot}; order ${BOOT_ORDER}, boots left A ${BOOT_A_LEFT}, B ${BOOT_B_LEFT}"
if test ${tb_slot} = A; then setenv tb_label ${tb_label_A}; else setenv tb_label ${tb_label_B}; fi
part number ${devtype} ${devnum} ${tb_label} tb_part
setenv tb_from ${devtype} ${devnum}:${tb_part}
part uuid ${tb_from} tb_uuid

# A missing init panics, a panic restarts, and a data partition that lost power in the middle of a
# write is mended without asking anybody.
setenv bootargs root=PARTUUID=${tb_uuid} rootwait ro init=/sbin/init panic=5 fsck.repair=yes rauc.slot=${tb_slot} ${board_args}

setenv tb_tree ${fdtcontroladdr}
if test -n "${fdt_addr_r}"; then
    if load ${tb_from} ${fdt_addr_r} /boot/dtb; then setenv tb_tree ${fdt_addr_r}; fi
fi
setenv tb_initrd -
for tb_file in /boot/initrd.img /initrd.img; do
    if test ${tb_initrd} = -; then
        if load ${tb_from} ${ramdisk_addr_r} ${tb_file}; then
            setenv tb_initrd ${ramdisk_addr_r}:${filesize}
        fi
    fi
done
for tb_file in /boot/Image /boot/vmlinuz /vmlinuz; do
    if load ${tb_from} ${kernel_addr_r} ${tb_file}; then
        booti ${kernel_addr_r} ${tb_initrd} ${tb_tree}
        bootz ${kernel_addr_r} ${tb_initrd} ${tb_tree}
    fi
done

echo "twinboot: slot ${tb_slot} does not boot"
reset
