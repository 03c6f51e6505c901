package sftpd

import (
	"os"
	"syscall"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"
)

// StatVFS implements sftp.StatVFSFileCmder (statvfs@openssh.com).
func (s *server) StatVFS(r *sftp.Request) (*sftp.StatVFS, error) {
	at, err := s.tree.find(r.Filepath)
	if err != nil {
		return nil, err
	}
	if at.vol == nil {
		return &sftp.StatVFS{Bsize: 4096, Frsize: 4096, Namemax: 255}, nil
	}
	at.rel = "."
	f, err := s.openAt(at, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return nil, bare(err)
	}
	out := &sftp.StatVFS{
		Bsize: uint64(st.Bsize), Frsize: uint64(st.Frsize), Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail,
		Files: st.Files, Ffree: st.Ffree, Favail: st.Ffree, Namemax: uint64(st.Namelen),
	}
	if at.vol.ReadOnly {
		out.Flag = syscall.MS_RDONLY
	}
	return out, nil
}
