package rootd

import (
	"errors"
	"fmt"
	"net"
	"os/user"
	"slices"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// peer is who connected, as the kernel says.
type peer struct {
	uid    uint32
	pid    int32
	groups []uint32 // supplementary and primary
}

// peerOf asks the kernel for the credentials that the peer had when it connected (unix(7): SO_PEERCRED, SO_PEERGROUPS).
func peerOf(c *net.UnixConn) (peer, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return peer{}, err
	}
	var p peer
	var perr error
	err = rc.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, perr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); perr != nil {
			return
		}
		p.uid, p.pid = cred.Uid, cred.Pid
		p.groups, perr = peerGroups(fd)
		p.groups = append(p.groups, cred.Gid)
	})
	if err = errors.Join(err, perr); err != nil {
		return peer{}, fmt.Errorf("peer credentials: %w", err)
	}
	return p, nil
}

// peerGroups is getsockopt(SO_PEERGROUPS), which golang.org/x/sys lacks.
func peerGroups(fd uintptr) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups) * 4)
		_, _, errno := syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch errno {
		case 0:
			return groups[:size/4], nil
		case syscall.ERANGE: // size says how much is wanted; at most NGROUPS_MAX, 65,536
			groups = make([]uint32, size/4)
		case syscall.ENOPROTOOPT: // before Linux 4.13
			return nil, nil
		default:
			return nil, errno
		}
	}
}

// allowed says whether p may use rootd.
func (c Config) allowed(p peer) error {
	if p.uid == 0 || c.UID >= 0 && int64(p.uid) == int64(c.UID) {
		return nil
	}
	hint := "end this doppel-rootd and start it with --uid " + strconv.FormatUint(uint64(p.uid), 10)
	if c.Service {
		hint = "join the group " + Group + " and log in again"
		if g, err := user.LookupGroup(Group); err == nil {
			if gid, err := strconv.ParseUint(g.Gid, 10, 32); err == nil && slices.Contains(p.groups, uint32(gid)) {
				return nil
			}
		}
	}
	return uerr.New(uerr.Denied, hint, "doppel-rootd does not serve user %d", p.uid)
}
