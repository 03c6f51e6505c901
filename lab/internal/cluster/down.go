package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/lab/internal/cgroup"
	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/plan"
	"github.com/doppel-dev/doppel/lab/internal/progress"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

const patience = 20 * time.Second

// Down removes the lab and all that belongs to it, in whatever state it is.
func Down(name string, say *progress.Printer) error {
	if err := plan.CheckName(name); err != nil {
		return err
	}
	unlock, err := state.Lock(name)
	if err != nil {
		return err
	}
	defer unlock()
	lab, err := state.Load(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		lab = state.New(plan.Lab{Name: name})
	case err != nil:
		return err
	}
	if err := remove(lab); err != nil {
		return fmt.Errorf("take lab %s down: %w", name, err)
	}
	say.Step("lab %s is down", name)
	return forget(name)
}

// forget removes the lab's lock file, which this process holds, and the root directory if no lab is left.
func forget(name string) error {
	unlock, err := state.Lock("")
	if err != nil {
		return err
	}
	defer unlock()
	return state.Forget(name)
}

// remove ends a lab's holders, with which the kernel ends processes, mounts, links and namespaces, and removes what
// lies in files. It may be called again and again.
func remove(lab *state.Lab) error {
	holders := []state.Process{lab.Wan}
	for _, l := range lab.Laptops {
		holders = append(holders, l.Holder)
	}
	for _, n := range lab.Nodes {
		holders = append(holders, n)
	}
	var errs []error
	for _, h := range holders {
		errs = append(errs, ns.Kill(h, patience))
	}
	if lab.Wan.PID != 0 {
		errs = append(errs, removeLink(lab.Plan.HostLink()))
	}
	errs = append(errs, cgroup.Remove(lab.Plan.Cgroup(), patience), unmountBelow(lab.Path()))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(lab.Path())
}

// removeLink removes the machine's end of the wire, which the kernel would do soon after the router's end.
func removeLink(name string) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// unmountBelow unmounts what is mounted below dir. Normally nothing is: a lab mounts in its own namespaces only.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			points = append(points, fields[4])
		}
	}
	for _, p := range slices.Backward(points) {
		if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", p, err)
		}
	}
	return nil
}
