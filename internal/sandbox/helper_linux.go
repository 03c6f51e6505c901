package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/tundev"
	"github.com/doppel-dev/doppel/internal/uerr"
)

const (
	helperFD   = 3 // the socket, in the helper
	maxMessage = 256 << 10
	begin      = "begin"

	devNetTun  = "/dev/net/tun"
	resolvConf = "/etc/resolv.conf"
	hosts      = "/etc/hosts"
	// scratch is where a file system in memory lies for a moment, seen by nobody else.
	scratch = "/tmp"
)

// hidden hold sockets through which the C library would ask the machine's own resolver, past resolv.conf (nss-resolve, nscd).
var hidden = []string{"/run/systemd/resolve", "/run/nscd", "/var/run/nscd"}

// Become is the helper: in fresh namespaces it makes the network that it is told over its socket, passes the device back, and, when told
// to begin, gives up what rights it had in there and becomes the command.
func Become(argv []string) error {
	runtime.LockOSThread() // capabilities and the death signal are a thread's
	f := os.NewFile(helperFD, "socket")
	c, err := net.FileConn(f)
	if err != nil {
		return uerr.Wrap(err, uerr.Usage, "use: doppel run", "this is a part of doppel run")
	}
	f.Close()
	conn := c.(*net.UnixConn)
	if err := answer(conn, nil, prepare()); err != nil {
		return err
	}
	buf := make([]byte, maxMessage)
	n, err := conn.Read(buf)
	if err != nil {
		return ended(err)
	}
	var o order
	if err := json.Unmarshal(buf[:n], &o); err != nil {
		return err
	}
	tun, err := build(o)
	if err := answer(conn, tun, err); err != nil {
		return err
	}
	if n, err = conn.Read(buf); err != nil || string(buf[:n]) != begin {
		return ended(err)
	}
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	// Again, for the kernel forgets it when credentials change (PR_SET_PDEATHSIG(2const)).
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("tie to the parent: %w", err)
	}
	return fmt.Errorf("run %s: %w", argv[0], unix.Exec(path, argv, os.Environ()))
}

// answer passes the device, or says what went wrong. The device then lives as long as doppel run has it.
func answer(conn *net.UnixConn, tun *os.File, err error) error {
	msg, oob := []byte("{}"), []byte(nil)
	if err != nil {
		var merr error
		if msg, merr = json.Marshal(uerr.From(err)); merr != nil {
			return merr
		}
	}
	if tun != nil {
		defer tun.Close()
		oob = unix.UnixRights(int(tun.Fd()))
	}
	_, _, err = conn.WriteMsgUnix(msg, oob, nil)
	return err
}

// ended is no error where doppel run changed its mind, which it has said itself.
func ended(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// prepare does what needs no order, so that a machine that forbids it says so before anything is done in the cluster.
func prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return refused(err, "make mounts private")
	}
	if err := loopbackUp(); err != nil {
		return refused(err, "set lo up")
	}
	tun, err := os.OpenFile(devNetTun, os.O_RDWR, 0)
	if err != nil {
		return tunRefused(err)
	}
	return tun.Close()
}

// build makes network and files, and returns the device.
func build(o order) (*os.File, error) {
	// So that ping works without privilege (icmp(7)); an old kernel may lack it.
	_ = os.WriteFile("/proc/sys/net/ipv4/ping_group_range", fmt.Appendf(nil, "%d %d", os.Getgid(), os.Getgid()), 0)
	tun, name, err := tundev.Open(o.Network.Name, o.Network.MTU, uint32(os.Getuid()))
	if err != nil {
		return nil, err
	}
	err = configure(name, o)
	if err == nil {
		err = mountFiles(o.Search)
	}
	if err != nil {
		tun.Close()
		return nil, err
	}
	return tun, nil
}

// refused marks what a security module forbids in a user namespace that it has let us make.
func refused(err error, what string) error {
	if errors.Is(err, fs.ErrPermission) {
		return uerr.Wrap(err, uerr.Denied, "", "%s", what)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// tunRefused has the hints for a device file that is missing, or root's alone; udev's own rule gives it to everybody.
func tunRefused(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return uerr.Wrap(err, uerr.Denied, "give users the device file, as most systems do: sudo chmod 0666 "+devNetTun+" (it makes devices in network namespaces of their own only)", "the command's network device")
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
		return uerr.Wrap(err, uerr.Internal, "load the kernel's tun module: sudo modprobe tun; in a container, pass the device in", "the command's network device")
	}
	return err
}

// configure sends everything into the device: what the cluster does not have is dialled by doppel run on the machine.
func configure(name string, o order) error {
	l, err := osroute.Find(name)
	if err != nil {
		return err
	}
	if err := l.SetQueueLen(tundev.QueueLen); err != nil {
		return err
	}
	mtu := o.Network.MTU
	if mtu == 0 {
		mtu = tundev.DefaultMTU
	}
	routes := []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0)}
	for _, a := range o.Network.Addrs {
		if a.Addr().Is6() { // without an address of its own, IPv6 is better not there at all
			routes = append(routes, netip.PrefixFrom(netip.IPv6Unspecified(), 0))
			break
		}
	}
	_, err = l.Apply(mtu, o.Network.Addrs, routes)
	return err
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}

// mountFiles puts our resolv.conf and hosts over the machine's, in this mount namespace. They lie in a file system in memory that has no
// place in the tree any more when it is done: nothing is left anywhere.
func mountFiles(search []string) error {
	machine, err := os.ReadFile(hosts)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, dir := range hidden {
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		if err := mountMemory(dir); err != nil {
			return err
		}
	}
	conf := nameserverConf(search)
	for _, name := range []string{"stub-resolv.conf", "resolv.conf"} { // what resolv.conf is a link to
		if _, err := os.Stat(hidden[0]); err == nil {
			if err := os.WriteFile(filepath.Join(hidden[0], name), []byte(conf), 0o444); err != nil {
				return err
			}
		}
	}
	if err := mountMemory(scratch); err != nil {
		return err
	}
	defer func() { _ = unix.Unmount(scratch, unix.MNT_DETACH) }()
	if err := cover(resolvConf, conf); err != nil {
		return uerr.Wrap(err, uerr.Internal, "programs find the resolver by "+resolvConf+": make an empty one", "give the command a resolver")
	}
	if err := cover(hosts, hostsFile(string(machine))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func mountMemory(dir string) error {
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=1m"); err != nil {
		return refused(err, "mount over "+dir)
	}
	return nil
}

// cover puts a file with the content over the one that path leads to.
func cover(path, content string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	tmp := filepath.Join(scratch, filepath.Base(path))
	if err := os.WriteFile(tmp, []byte(content), 0o444); err != nil {
		return err
	}
	if err := unix.Mount(tmp, real, "", unix.MS_BIND, ""); err != nil {
		return refused(err, "mount over "+real)
	}
	return nil
}
