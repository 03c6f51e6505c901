package lifecycle

import (
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A listener whose process is out of descriptors for a while, say, gives those that come then, and is not asked without a pause.
func TestAccept(t *testing.T) {
	const times = 20
	for _, tt := range []struct {
		err error
		on  bool
	}{
		{syscall.EMFILE, true},
		{syscall.ENFILE, true},
		{syscall.ENOBUFS, true},
		{syscall.ENOMEM, true},
		{syscall.ECONNABORTED, true},
		{syscall.EINVAL, false},
		{net.ErrClosed, false},
	} {
		t.Run(tt.err.Error(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var asked []time.Time
				conn := new(net.TCPConn)
				c, err := Accept(func() (*net.TCPConn, error) {
					if asked = append(asked, time.Now()); len(asked) <= times {
						return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", tt.err)}
					}
					return conn, nil
				})
				if !tt.on {
					if err == nil || len(asked) != 1 {
						t.Errorf("%v, %v after %d tries", c, err, len(asked))
					}
					return
				}
				if c != conn || err != nil {
					t.Errorf("%v, %v", c, err)
				}
				for i := range times {
					if d := asked[i+1].Sub(asked[i]); d < acceptPause || d > acceptPauseMax {
						t.Errorf("%v between tries %d and %d", d, i, i+1)
					}
				}
			})
		})
	}
}
