package agentcfg

// injectFalse is the older word for InjectDisabled.
const injectFalse = "false"

// Forbids says whether a pod with these annotations is to have no agent.
func Forbids(annotations map[string]string) bool {
	v := annotations[AnnotationInject]
	return v == InjectDisabled || v == injectFalse
}

// Keeps says whether its owner wants a pod with these annotations to have an agent, intercepted or not. On a pod that doppel made again the
// annotation is doppel's own.
func Keeps(annotations map[string]string) bool {
	return annotations[AnnotationInject] == InjectEnabled && annotations[AnnotationOriginal] == ""
}
