package storetest

import (
	"os"
	"os/exec"
	"syscall"
)

// asNobody has a command take itself for nobody (user_namespaces(7)), and end with this process. It reads what root reads: the unpacked programs may
// be in a directory that nobody else may enter.
func asNobody(c *exec.Cmd) {
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT}
	if os.Geteuid() == 0 {
		ids := []syscall.SysProcIDMap{{ContainerID: nobody, HostID: 0, Size: 1}}
		c.SysProcAttr.Cloneflags, c.SysProcAttr.UidMappings, c.SysProcAttr.GidMappings = syscall.CLONE_NEWUSER, ids, ids
	}
}
